"""What `report.py` puts on its page."""
