"""Industrial defect detection from defect-free images."""
