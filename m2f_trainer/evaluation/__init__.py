"""From logits to Instances, and from Instances to the official COCO figures, tables and pictures."""
