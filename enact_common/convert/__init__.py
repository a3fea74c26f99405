"""Pascal VOC and YOLO data sets in COCO's layout: `python -m enact_common.convert --help`."""
