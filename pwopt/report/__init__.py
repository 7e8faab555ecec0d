"""The report floor: one result, rendered as JSON, for a terminal, or as HTML."""
