"""From records to tables: never a device, never TVM."""
