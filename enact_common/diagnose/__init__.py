"""Diagnosis of a detector: which errors cost AP, where, in which images, and which labels are likely wrong."""
