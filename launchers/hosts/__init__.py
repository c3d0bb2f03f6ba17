"""A deepspeed start over hosts: the front, its ranks, node lists, the network between them."""
