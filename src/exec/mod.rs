//! How work, outputs and scratch memory are spread over cores: threads, outputs that several of them write, buffers that one of
//! them reuses. The only place with shared mutable memory.

mod buffer;
mod outputs;
pub(crate) mod threads;

pub(crate) use buffer::Buffer;
pub(crate) use outputs::Chunks;
pub use outputs::TensorMut;
