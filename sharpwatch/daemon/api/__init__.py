"""gRPC and HTTP services, and who may call them."""
