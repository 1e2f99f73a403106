"""The gate measured by experiment: its false alarms and its power, from recorded and live A/A series."""
