"""Models, data and runs that tests share."""
