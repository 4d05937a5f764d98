"""What is wrong with an adapter's files, and how to put it right, without loading the base."""

from multigraft.diagnosis.doctor import doctor
from multigraft.diagnosis.findings import Diagnosis, Finding

__all__ = ["Diagnosis", "Finding", "doctor"]
