"""The store of artifacts and blobs, which are named by hashes, in a local folder or a bucket."""
