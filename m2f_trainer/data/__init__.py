"""From a COCO folder to batches: layouts, masks, images, augmentation, collation, and a small synthetic set."""
