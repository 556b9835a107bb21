"""Helpers without a subject: files, batches, progress, modules on disk."""
