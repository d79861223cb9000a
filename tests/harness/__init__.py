"""What tests run against: an S3 server, Ray clusters, a proxy that makes faults, small models, and their processes."""
