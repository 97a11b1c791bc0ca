"""Parts of `recipes/fetch_data.py`: package clients, archive formats, and the table of sources."""
