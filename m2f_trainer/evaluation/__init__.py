"""Score Instances: the official COCO figures, diagnostics, reports and pictures."""
