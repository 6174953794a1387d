"""The report room: files in, tables and one HTML page out. It imports no torch."""
