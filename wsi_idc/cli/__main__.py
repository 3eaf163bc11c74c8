"""`python -m wsi_idc.cli`."""

from wsi_idc.cli.main import main

main()
