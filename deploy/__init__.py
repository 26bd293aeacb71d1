"""Renders and checks job specs and calls gcloud. Needs Python 3.9 and PyYAML."""
