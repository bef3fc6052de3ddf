"""What goes beyond the report, one technique a file."""
