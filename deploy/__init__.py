"""Sends the job to Google Cloud: renders and checks job specs and calls gcloud. Needs Python 3.9 and nothing else."""
