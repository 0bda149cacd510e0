//! Computations on one tile, generic over the vector type: no threads, no allocation, no idea of a plan.
//!
//! Logits are kept transposed, one row per key and one lane per query. Then the running maximum, the exponentials and
//! the sums of the softmax are plain operations on whole vectors, with no reduction across lanes, and the transposed
//! weights are just the operand order in which the next product reads them. Queries (and the gradient of the output)
//! are packed transposed once per tile; keys and values are read where they lie. [`AttendRows`] does it the other way round, for
//! queries that do not lie together.

mod attend_rows;
mod bf16;
mod bf16_pack;
mod bias;
mod block_softmax;
mod bounds;
mod codes;
mod distances;
mod dot_rows;
mod dot_tile;
mod dropout;
mod gemm;
mod guarded;
mod largest;
mod matrix;
mod pack;
mod pool;
mod row_product;
mod rows_at;
mod softcap;
mod softmax;
mod tmul;
mod tmul_pack;

pub(crate) use attend_rows::{AttendRows, MOST_QUERIES, Visible, WeightRows};
pub(crate) use bf16::{AddValues, KeyDots, all_finite};
pub(crate) use bf16_pack::{RoundRows, ZipRows, pack_channel_pairs};
pub(crate) use bias::{AddBias, AddDistances, Extend, ExtendMask, Positions};
pub(crate) use block_softmax::{BlockSoftmax, BlockSoftmaxGradient};
pub(crate) use bounds::{Bounds, Reached};
pub(crate) use codes::{Deviate, Encode, LargestProducts};
pub(crate) use distances::{Candidate, ColumnMaxima, FindNear};
pub(crate) use dot_rows::DotRows;
pub(crate) use dropout::{Decisions, DropWeights, Dropout, DropoutRows, Stream};
pub(crate) use gemm::{Gemm, Init};
pub(crate) use guarded::product;
pub(crate) use largest::{AllFinite, Largest};
pub(crate) use matrix::{Matrix, MatrixMut};
pub(crate) use pack::{NarrowScaled, NarrowSum, pack_rows, pack_transposed};
pub(crate) use pool::AddRows;
pub(crate) use row_product::RowProduct;
pub(crate) use rows_at::AddRowsAt;
pub(crate) use softcap::Softcap;
pub(crate) use softmax::{LogitGradient, OnlineSoftmax};
pub(crate) use tmul::{TmulGemm, TmulInit, room_for_rows};
pub(crate) use tmul_pack::{PackPairs, RoundColumns, RoundLines};
