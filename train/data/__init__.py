"""Data: segmentation data sets, the choice of the labelled images, endless batches that resume exactly."""
