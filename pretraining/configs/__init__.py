"""Run records: each file is one run, its `config` and what it took."""
