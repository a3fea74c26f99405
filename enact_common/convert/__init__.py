"""Convert Pascal VOC and YOLO data sets to the COCO layout: `python -m enact_common.convert --help`."""
