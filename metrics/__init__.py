"""What each layer does to the residual stream: calibration windows, capture, similarity, scores."""
