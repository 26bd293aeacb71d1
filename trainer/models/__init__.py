"""Networks: the BiT family, students, teachers."""
