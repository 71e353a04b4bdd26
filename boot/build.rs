//! Rebuilds, and so relinks the images, when the linker script or the assembly changes.
fn main() {
    println!("cargo:rerun-if-changed=link.ld");
    println!("cargo:rerun-if-changed=src/entry");
}
