"""Bytes at rest that are not adapters: plain files, and blobs in a directory or in S3."""
