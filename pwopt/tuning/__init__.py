"""The tuning floor: which rewrites to keep."""
