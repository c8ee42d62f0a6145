"""Tests of the service as it is deployed, a file for each part. The cart in the process is in ../test_cart.py."""
