"""What the scripts share, one job a module."""
