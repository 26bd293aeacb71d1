"""What a run leaves for people and programs: export, report, samples, model card.

Imports: everything but the verbs. A new export format is a row of EXPORTERS in export.py.
"""
