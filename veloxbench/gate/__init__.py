"""Judging records: verdicts, paired tests, baselines and who approved them. It reads records only; it fails closed."""
