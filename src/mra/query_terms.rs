//! What backward needs to know of every query beforehand, and how it writes a gradient at the end.

use super::attend::{KeySums, QueryTerms};
use super::inputs::{Gradients, Saved};
use super::problem::{Batch, Problem};
use crate::exec::{Buffer, Chunks, threads};
use crate::kernels::{NarrowSum, RowProduct};
use crate::simd::{Element, Level, Scalar};

/// Lse and delta of every query, at the flat index of its batch item, head and token.
pub(crate) fn query_terms<E: Element>(problem: &Problem<'_>, saved: &Saved<'_, E>) -> Vec<QueryTerms<E::Compute>> {
    let (length, heads) = (problem.query_len, problem.batch * problem.heads);
    // A padded query is idle, too.
    let idle = QueryTerms { lse: E::Compute::INFINITY, delta: E::Compute::ZERO, idle: true };
    let mut terms = vec![idle; heads * length];
    let value_dim = saved.out.shape()[3];
    let chunks = Chunks::new(&mut terms, length);
    let threads = problem.threads_to_read(heads * length * value_dim);
    let scratch = || (Buffer::scratch(value_dim), Buffer::scratch(value_dim));
    threads::for_each(threads, if length == 0 { 0 } else { heads }, scratch, |(grad_line, out_line), task| {
        let (item, head) = (task / problem.heads, task % problem.heads);
        let (grads, outs, lses) = (saved.grad_out.head(item, head), saved.out.head(item, head), saved.lse.head(item, head));
        let grad_lses = saved.grad_lse.map(|tensor| tensor.head(item, head));
        // SAFETY: each task has its own head.
        let terms = unsafe { chunks.get_mut(task) };
        let start = problem.segments.partition_point(|segment| segment.batch < item);
        let end = problem.segments.partition_point(|segment| segment.batch <= item);
        for segment in &problem.segments[start..end] {
            for number in 0..segment.rows.total() {
                let token = segment.rows.token(number);
                let grad_lse = grad_lses.map_or(E::Compute::ZERO, |grad_lses| grad_lses.row(token)[0]);
                let lines: [&mut [E::Compute]; 2] = [&mut *grad_line, &mut *out_line];
                let product = RowProduct { x: grads.row(token), y: outs.row(token), lines };
                let (product, is_zero) = E::Compute::run(problem.level, product);
                if grad_lse == E::Compute::ZERO && is_zero {
                    continue;
                }
                let lse = lses.row(token)[0];
                terms[token] = QueryTerms {
                    // A query that saw no key has weights exp(x - inf) = 0.
                    lse: if lse == E::Compute::NEG_INFINITY { E::Compute::INFINITY } else { lse },
                    delta: if grad_lses.is_some() { product - grad_lse } else { product },
                    idle: false,
                };
            }
        }
    });
    terms
}

/// Computes the gradient of the sink of every head of every batch item: a sink has a weight in each query's softmax, and no value.
pub(crate) fn sink_gradients<T: Scalar>(problem: &Problem<'_>, terms: &[QueryTerms<T>], to: &mut [f64]) {
    to.fill(0.0);
    if problem.query_len == 0 {
        return;
    }
    for (index, (to, terms)) in to.iter_mut().zip(terms.chunks_exact(problem.query_len)).enumerate() {
        let Some(sink) = problem.sink(index / problem.heads, index % problem.heads) else { continue };
        // An infinite lse is that of a query that saw no key, whose gradients may be NaN.
        let counts = |terms: &&QueryTerms<T>| !terms.idle && terms.lse < T::INFINITY;
        let of_query = |terms: &QueryTerms<T>| ((T::from_f64(sink) - terms.lse).exp() * terms.delta).into();
        *to -= terms.iter().filter(counts).map(of_query).sum::<f64>();
    }
}

/// Adds a token's share of its block's pooled gradient and writes the sum.
pub(crate) fn finish<E: Element>(
    level: Level,
    sums: &[E::Compute],
    pooled: Option<&[E::Compute]>,
    count: usize,
    line: &mut [E::Compute],
    to: &mut [E],
) {
    let share = pooled.map(|pooled| (E::Compute::from_f64(1.0 / count as f64), pooled));
    E::Compute::run(level, NarrowSum { sums, share, line, to });
}

/// What there is of keys and of values.
pub(crate) type KeyAndValue<R> = (R, R);

/// Writes dk and dv of a block of keys of a group, from the sums of its tokens and the gradients of its means.
///
/// # Safety
/// - Nothing else holds the rows of this block in the gradients of keys and values.
pub(crate) unsafe fn finish_keys<E: Element>(
    problem: &Problem<'_>,
    batch: &Batch<'_>,
    gradients: &Gradients<'_, E>,
    (group, block): (usize, usize),
    sums: &KeySums<'_, E::Compute>,
    pooled: Option<KeyAndValue<&[E::Compute]>>,
) {
    let (item, kv_head) = batch.item_and_kv_head(group);
    let blocks = &batch.segment_of_group(group).keys;
    let count = blocks.count(block);
    let outputs =
        [(&gradients.key, &*sums.dk, pooled.map(|(dk, _)| dk)), (&gradients.value, &*sums.dv, pooled.map(|(_, dv)| dv))];
    for (output, sums_of_all, pooled) in outputs {
        let channels = output.shape()[3];
        let width = problem.padded::<E::Compute>(channels);
        if count < blocks.range(block).len() {
            for token in blocks.range(block) {
                // SAFETY: the caller's.
                unsafe { output.row_mut(item, kv_head, token) }.fill(E::default());
            }
        }
        let mut line = [E::Compute::ZERO; 256];
        for number in blocks.numbers(block) {
            // SAFETY: the caller's.
            let to = unsafe { output.row_mut(item, kv_head, blocks.token(number)) };
            let row = &sums_of_all[(number - sums.first) * width..][..channels];
            for start in (0..channels).step_by(line.len()) {
                let part = start..(start + line.len()).min(channels);
                let pooled = pooled.map(|pooled| &pooled[part.clone()]);
                finish(problem.level, &row[part.clone()], pooled, count, &mut line, &mut to[part]);
            }
        }
    }
}
