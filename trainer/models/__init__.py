"""Networks: the BiT family, students, teachers, their weight files and their quantization.

Imports: core, io. A new student is a row of STUDENTS in students.py, a new kind of teacher a row
of KINDS in teachers.py.
"""
