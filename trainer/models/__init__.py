"""Networks: the BiT family, students, teachers, their weight files and their cheaper forms.

Imports: core, io. A new student is a row of STUDENTS in students.py; a new kind of teacher a branch of teachers.py.
"""
