"""One file a format: export to disk, open a session, name its quantizer, translate its errors."""
