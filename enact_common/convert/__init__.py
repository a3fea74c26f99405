"""Convert other formats to the COCO layout: `python -m enact_common.convert --help` lists them."""
