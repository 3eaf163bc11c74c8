"""The tile store; see `store.py`."""

from wsi_idc.store.backing import Holding
from wsi_idc.store.map import MapState, StoredMap
from wsi_idc.store.node import Node, Record
from wsi_idc.store.slide import StoredSlide
from wsi_idc.store.store import Store, Ticket, admit, at_once, find_store, hold_store, open_store, open_to_check

__all__ = [
    "Holding",
    "MapState",
    "Node",
    "Record",
    "Store",
    "StoredMap",
    "StoredSlide",
    "Ticket",
    "admit",
    "at_once",
    "find_store",
    "hold_store",
    "open_store",
    "open_to_check",
]
