# See registers.s.
.purgem SAVE_REGISTERS
.purgem RESTORE_REGISTERS
