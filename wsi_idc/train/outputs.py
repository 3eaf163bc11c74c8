"""What a training writes beside the network: records and tables, each whole or absent."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wsi_idc.csvs import csv_text
from wsi_idc.evaluate.page import plain
from wsi_idc.files import write_whole


def put_json(path: Path, value: Any) -> None:
    """Write a record; NaN becomes null, since JSON has none.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(path, (json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n").encode())


def put_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV, a row a mapping.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(path, csv_text(rows).encode())
