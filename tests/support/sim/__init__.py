"""A second device for machines without a GPU: `sim`, with the processor's memory and operators and a GPU's rules.

What CUDA refuses is refused: tensors of two devices in one operation, a processor's generator, `.numpy()`. Fresh memory
holds NaN. A copy that nobody waited for is poison on the host. Memory has an end (SIM_MEMORY, bytes a device). Several
ranks get a device each (SIM_DEVICES, 2; 0 for none), and talk through a process group of the device.
`build.installed` makes a folder: with it on PYTHONPATH every Python gets the device as soon as torch is imported.
"""
