//! The native way into traps: interrupt descriptor table, task state segment, interrupt stacks.
