"""Calibration data: text windows, images, and their settings."""
