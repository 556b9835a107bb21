"""Hosts: getting one, knowing one."""
