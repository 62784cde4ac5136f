"""vhost-user and virtio: the protocol behind a guest's port."""
