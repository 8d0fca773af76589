"""Stages: each turns one artifact into another and accounts for what it did."""
