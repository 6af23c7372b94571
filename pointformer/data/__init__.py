"""Reading pictures, annotations and data sets, writing predictions, and augmenting pictures."""

from pointformer.annotations import VOID, Category, Mask, Objects, Segment, SegmentMap
from pointformer.data.annotations import (
    Annotation,
    Dataset,
    named_categories,
    read_categories,
)
from pointformer.data.categories import (
    ADE20K,
    CITYSCAPES,
    CITYSCAPES_THINGS,
    COCO,
    COCO_PANOPTIC,
)
from pointformer.data.cityscapes import (
    read_cityscapes,
    read_cityscapes_objects,
    write_cityscapes_objects,
)
from pointformer.data.classes import read_class_folders
from pointformer.data.coco import (
    CocoResults,
    read_coco_instances,
    read_coco_panoptic,
    write_coco_panoptic,
    write_coco_results,
)
from pointformer.data.folders import read_folder, write_folder_objects
from pointformer.data.images import (
    Picture,
    Reading,
    image_size,
    open_picture,
    read_image,
    read_instances,
    read_labels,
)
from pointformer.data.labels import read_ade20k, write_labels, write_map
from pointformer.data.points import iterate_points, read_points, write_classes, write_points
from pointformer.data.sources import FORMATS, find_source, open_dataset, open_splits

__all__ = [
    "ADE20K",
    "CITYSCAPES",
    "CITYSCAPES_THINGS",
    "COCO",
    "COCO_PANOPTIC",
    "FORMATS",
    "VOID",
    "Annotation",
    "Category",
    "CocoResults",
    "Dataset",
    "Mask",
    "Objects",
    "Picture",
    "Reading",
    "Segment",
    "SegmentMap",
    "find_source",
    "image_size",
    "iterate_points",
    "named_categories",
    "open_dataset",
    "open_picture",
    "open_splits",
    "read_ade20k",
    "read_categories",
    "read_cityscapes",
    "read_cityscapes_objects",
    "read_class_folders",
    "read_coco_instances",
    "read_coco_panoptic",
    "read_folder",
    "read_image",
    "read_instances",
    "read_labels",
    "read_points",
    "write_cityscapes_objects",
    "write_classes",
    "write_coco_panoptic",
    "write_coco_results",
    "write_folder_objects",
    "write_labels",
    "write_map",
    "write_points",
]
