//! Backward: the gradients of queries, keys and values in closed form (docs/definitions.md, section 3, Backward).
//!
//! ```text
//! delta_t = <g_t, out_t> - dlse_t                                               once per query
//! coarse levels: the same gradient among pooled tokens, with summed g           mra::block::levels_backward
//! exact blocks: for each tile of queries, for each batch of its selected keys    mra::attend
//! dq_t = exact + dqh_i / count_i        dk_s, dv_s likewise
//! ```
//!
//! Nothing is kept from forward but out, lse and the plan. Where there are enough heads for the threads, a task is a
//! group of heads that share keys, and computes all three gradients in one pass: 5 products per block. Otherwise rows of the
//! plan drive dq and columns dk and dv: 7 products, but a task for each block. Both give the same bits, because every
//! sum is in the same order.

use std::ops::Range;

use super::coarse_backward::{CoarseGradients, one_pass};
use super::first_order_backward::FirstOrderPass;
use super::first_order_gradients::FirstOrderGradients;
use super::levels::read_plans;
use super::levels_backward::coarse_backward;
use crate::exec::{Buffer, threads};
use crate::kernels::Stream;
use crate::mra::attend::{BiasTile, GradientTile, KeyBatch, KeySource, KeySums, QueryTerms, tile_columns, tiles};
use crate::mra::inputs::{Gradients, Inputs};
use crate::mra::problem::{Batch, Mode, Problem};
use crate::mra::pyramid::BlockLevel;
use crate::mra::query_terms::{finish, finish_keys};
use crate::mra::select::BlockPlan;
use crate::simd::{Element, Scalar, prefetch_far};
use crate::tensor::Tensor;

/// Computes the gradients of the segments of this form. Shapes are those of the problem.
pub(crate) fn backward<E: Element>(
    problem: &Problem<'_>,
    batch: &Batch<'_>,
    inputs: &Inputs<'_, E>,
    grad_out: &Tensor<'_, E>,
    terms: &[QueryTerms<E::Compute>],
    plan: &[u8],
    gradients: &Gradients<'_, E>,
) {
    let levels = BlockLevel::all(problem);
    let plans = read_plans(&levels, plan);
    let plan = &plans[plans.len() - 1];
    let mut pass = Pass::new(problem, batch, inputs, grad_out, terms, plan, gradients);
    let expansion = problem.expands().then(|| {
        let exact = Pass::new(problem, batch, inputs, grad_out, terms, plan, gradients);
        FirstOrderPass::new(problem, batch, inputs, plan, exact)
    });
    if problem.mode == Mode::Full && expansion.is_none() {
        pass.coarse = coarse_backward(&levels, &plans, inputs, grad_out, terms);
    }
    let products = plan.num_blocks() * problem.block_size.pow(2) * 3;
    let of_coarse = expansion.as_ref().map_or(0, FirstOrderPass::products);
    let threads = problem.threads_for(products * (problem.head_dim + pass.value_dim) + of_coarse);
    if one_pass(batch.groups(), threads) {
        pass.by_groups(threads, expansion.as_ref());
    } else {
        pass.first_order = expansion.map(|expansion| expansion.gradients(threads));
        pass.by_rows(threads);
        pass.by_columns(threads);
    }
}

/// What a thread computes a block in.
pub(super) struct Buffers<T> {
    pub(super) tile: GradientTile<T>,
    pub(super) keys: KeyBatch<T>,
    pub(super) bias: BiasTile<T>,
    pub(super) line: Buffer<T>,
}

/// What coarse blocks to first order add to the gradients of a block of queries.
#[derive(Clone, Copy)]
struct RowStart<'a, T> {
    /// To those of its queries.
    dq: &'a [T],
    /// To that of their mean.
    mean: &'a [T],
}

/// The exact blocks of all heads, and the writing of the results.
pub(super) struct Pass<'a, 'g, E: Element> {
    pub(super) problem: &'a Problem<'a>,
    pub(super) batch: &'a Batch<'a>,
    inputs: &'a Inputs<'a, E>,
    grad_out: &'a Tensor<'a, E>,
    terms: &'a [QueryTerms<E::Compute>],
    plan: &'a BlockPlan,
    coarse: Option<CoarseGradients<E::Compute>>,
    first_order: Option<FirstOrderGradients<E::Compute>>,
    gradients: &'a Gradients<'g, E>,
    value_dim: usize,
    /// Takes the place of the rows of idle queries.
    zeros: Vec<E>,
}

impl<'a, 'g, E: Element> Pass<'a, 'g, E> {
    /// The exact blocks alone: the coarse level is computed by itself.
    pub(super) fn new(
        problem: &'a Problem<'a>,
        batch: &'a Batch<'a>,
        inputs: &'a Inputs<'a, E>,
        grad_out: &'a Tensor<'a, E>,
        terms: &'a [QueryTerms<E::Compute>],
        plan: &'a BlockPlan,
        gradients: &'a Gradients<'g, E>,
    ) -> Self {
        let value_dim = inputs.value.shape()[3];
        let zeros = vec![E::default(); problem.head_dim.max(value_dim)];
        Self { problem, batch, inputs, grad_out, terms, plan, coarse: None, first_order: None, gradients, value_dim, zeros }
    }

    /// One task for each group of heads that share keys: all gradients in one pass.
    fn by_groups(&self, threads: usize, expansion: Option<&FirstOrderPass<'_, '_, E>>) {
        let rows = self.batch.segments.iter().map(|segment| segment.rows.len()).max().unwrap_or(0);
        let (size, heads) = (self.problem.block_size, self.problem.heads / self.problem.kv_heads.max(1));
        let scratch = || {
            let buffers = self.buffers();
            let (key_width, value_width) = (buffers.tile.key_width, buffers.tile.value_width);
            let keys = self.batch.most_keys();
            let of_rows = |count: usize| Buffer::scratch(heads * count * key_width);
            let of_coarse = expansion.map(|expansion| (expansion.scratch(), of_rows(rows * size), of_rows(rows)));
            (buffers, Buffer::scratch(keys * key_width), Buffer::scratch(keys * value_width), of_coarse)
        };
        threads::for_each(threads, self.batch.groups(), scratch, |(buffers, dk, dv, of_coarse), group| {
            let segment = self.batch.segment_of_group(group);
            buffers.tile.set_biased(segment.is_biased());
            let source = buffers.tile.source(self.source(group));
            dk.fill(E::Compute::ZERO);
            dv.fill(E::Compute::ZERO);
            if let (Some(expansion), Some((scratch, dq, means))) = (expansion, &mut *of_coarse) {
                let sums = &mut KeySums { dk: &mut *dk, dv: &mut *dv, first: 0 };
                expansion.group(group, (scratch, dq, means), (rows * size, rows), sums);
            }
            let width = buffers.tile.key_width;
            for (index, head) in self.batch.heads_of(group).enumerate() {
                for i in 0..segment.rows.len() {
                    let of_coarse = of_coarse.as_ref().map(|(_, dq, means)| RowStart {
                        dq: &dq[(index * rows * size + segment.rows.start(i)) * width..],
                        mean: &means[(index * rows + i) * width..][..width],
                    });
                    // SAFETY: each task has its own heads.
                    unsafe { self.row(head, i, buffers, &source, of_coarse, Some(&mut KeySums { dk, dv, first: 0 })) };
                }
            }
            for block in 0..segment.keys.len() {
                // SAFETY: as below.
                unsafe { self.prefetch_keys_after(group, block, &KeySums { dk, dv, first: 0 }) };
                // SAFETY: each task has its own group of heads.
                unsafe { self.finish_keys(group, block, &KeySums { dk, dv, first: 0 }) };
            }
        });
    }

    /// One task for each block of queries: dq.
    fn by_rows(&self, threads: usize) {
        threads::for_each(
            threads,
            self.batch.rows(),
            || self.buffers(),
            |buffers, task| {
                let (head, i) = self.batch.row_at(task);
                buffers.tile.set_biased(self.batch.segment(head).is_biased());
                let source = buffers.tile.source(self.source(self.batch.group(head)));
                let of_coarse = self.first_order.as_ref().map(|first_order| RowStart {
                    dq: first_order.dq(self.batch, head, self.batch.segment(head).rows.numbers(i)),
                    mean: first_order.mean(self.batch, head, i),
                });
                // SAFETY: each task has its own block of queries.
                unsafe { self.row(head, i, buffers, &source, of_coarse, None) };
            },
        );
    }

    /// One task for each block of keys: dk and dv.
    fn by_columns(&self, threads: usize) {
        let problem = self.problem;
        let scratch = || {
            let buffers = self.buffers();
            let (key_width, value_width) = (buffers.tile.key_width, buffers.tile.value_width);
            (buffers, Buffer::scratch(problem.block_size * key_width), Buffer::scratch(problem.block_size * value_width))
        };
        threads::for_each(threads, self.batch.columns(), scratch, |(Buffers { tile, keys, bias, .. }, dk, dv), task| {
            let (group, block) = self.batch.column_at(task);
            tile.set_biased(self.batch.segment_of_group(group).is_biased());
            let source = tile.source(self.source(group));
            let numbers = source.numbers(block);
            self.start_keys(group, numbers.clone(), dk, dv);
            keys.clear();
            keys.push(&source, numbers.clone());
            for head in self.batch.heads_of(group) {
                for &i in self.plan.column(self.batch, head, block) {
                    for queries in tiles(self.batch.segment(head).rows.numbers(i as usize)) {
                        self.start(head, queries.clone(), tile);
                        let sums = KeySums { dk: &mut *dk, dv: &mut *dv, first: numbers.start };
                        tile.add(keys, &source, false, Some(sums), |logits, columns| {
                            bias.apply(problem, self.batch, head, &queries, keys, logits, columns);
                        });
                    }
                }
            }
            // SAFETY: each task has its own block of keys.
            unsafe { self.finish_keys(group, block, &KeySums { dk, dv, first: numbers.start }) };
        });
    }

    /// Starts the gradients of keys of a group, by their numbers, with what there is of coarse blocks to first order.
    fn start_keys(&self, group: usize, numbers: Range<usize>, dk: &mut [E::Compute], dv: &mut [E::Compute]) {
        if let Some(first_order) = &self.first_order {
            let (of_keys, of_values) = first_order.keys(self.batch, group, numbers);
            dk[..of_keys.len()].copy_from_slice(of_keys);
            dv[..of_values.len()].copy_from_slice(of_values);
        } else {
            dk.fill(E::Compute::ZERO);
            dv.fill(E::Compute::ZERO);
        }
    }

    /// What is known of a query of a flat head.
    pub(super) fn terms_of(&self, head: usize, token: usize) -> QueryTerms<E::Compute> {
        let (item, head) = self.batch.item_and_head(head);
        self.terms[(item * self.problem.heads + head) * self.problem.query_len + token]
    }

    pub(super) fn buffers(&self) -> Buffers<E::Compute> {
        let columns = tile_columns::<E::Compute>(self.problem);
        Buffers {
            tile: GradientTile::for_tensors::<E>(self.problem, columns, self.value_dim),
            keys: KeyBatch::new(self.problem, self.problem.head_dim, self.value_dim)
                .keeping(self.problem, self.batch.most_keys()),
            bias: BiasTile::new(self.problem, columns),
            line: Buffer::scratch(self.problem.head_dim),
        }
    }

    /// The keys and values of a group of heads.
    pub(super) fn source(&self, group: usize) -> KeySource<'_, E> {
        let (item, kv_head) = self.batch.item_and_kv_head(group);
        let (keys, values) = (self.inputs.key.head(item, kv_head), self.inputs.value.head(item, kv_head));
        KeySource::new(self.problem, keys, values, &self.batch.segment_of_group(group).keys)
    }

    pub(super) fn start(&self, head: usize, queries: Range<usize>, tile: &mut GradientTile<E::Compute>) {
        let (item, head_of_item) = self.batch.item_and_head(head);
        let rows = &self.batch.segment(head).rows;
        tile.set_biased(self.batch.segment(head).is_biased());
        let (query, grad) = (self.inputs.query.head(item, head_of_item), self.grad_out.head(item, head_of_item));
        let terms = &self.terms[(item * self.problem.heads + head_of_item) * self.problem.query_len..];
        let tokens = queries.map(|number| rows.token(number));
        let query_row = |token: usize| if terms[token].idle { &self.zeros[..self.problem.head_dim] } else { query.row(token) };
        let grad_row = |token: usize| if terms[token].idle { &self.zeros[..self.value_dim] } else { grad.row(token) };
        tile.start(tokens.clone().map(query_row), tokens.clone().map(grad_row), tokens.clone().map(|token| terms[token]));
        let first = rows.tokens().start;
        tile.number_queries(Stream::Exact, self.batch.dropout_head(head), tokens.map(|token| token - first));
    }

    /// One block of queries against its selected keys: dq, and dk and dv if wanted.
    ///
    /// # Safety
    /// - Nothing else holds the rows of this block in the gradient of the queries.
    unsafe fn row(
        &self,
        head: usize,
        i: usize,
        buffers: &mut Buffers<E::Compute>,
        source: &KeySource<'_, E>,
        of_coarse: Option<RowStart<'_, E::Compute>>,
        mut sums: Option<&mut KeySums<'_, E::Compute>>,
    ) {
        let (Buffers { tile, keys, bias, line }, after) = (buffers, self.batch.segment(head).rows.count(i));
        let (item, head_of_item) = self.batch.item_and_head(head);
        let segment = self.batch.segment(head);
        let rows = &segment.rows;
        if rows.count(i) < rows.range(i).len() {
            for token in rows.range(i) {
                // SAFETY: the caller's.
                unsafe { self.gradients.query.row_mut(item, head_of_item, token) }.fill(E::default());
            }
        }
        for queries in tiles(rows.numbers(i)) {
            self.start(head, queries.clone(), tile);
            for number in queries.clone() {
                // To write a line that is far waits for it, too.
                // SAFETY: the caller's.
                prefetch_far(unsafe { self.gradients.query.row_mut(item, head_of_item, rows.token(number)) });
            }
            if let Some(RowStart { dq, .. }) = &of_coarse {
                let (first, len) = (queries.start - rows.start(i), queries.len() * tile.key_width);
                tile.dq[..len].copy_from_slice(&dq[first * tile.key_width..][..len]);
            }
            let step = |keys: &KeyBatch<E::Compute>| {
                tile.add(keys, source, true, sums.as_deref_mut().map(KeySums::reborrow), |logits, columns| {
                    bias.apply(self.problem, self.batch, head, &queries, keys, logits, columns);
                });
            };
            self.for_batches(head, i, keys, source, step);
            let of_mean = of_coarse.as_ref().map(|of_coarse| of_coarse.mean);
            let pooled = of_mean.or_else(|| self.coarse.as_ref().map(|coarse| coarse.dq(self.batch, head, i)));
            for (query, number) in queries.enumerate() {
                let row = &tile.dq[query * tile.key_width..][..self.problem.head_dim];
                let token = rows.token(number);
                self.prefetch_query(head, number + after);
                // SAFETY: the caller's.
                let to = unsafe { self.gradients.query.row_mut(item, head_of_item, token) };
                let pooled = pooled.filter(|_| segment.queries.counts(token));
                finish(self.problem.level, row, pooled, segment.queries.count(i), line, to);
            }
        }
    }

    /// Prefetches what is read of a query of the next block, which this thread probably has next, if there is one with this number.
    fn prefetch_query(&self, head: usize, number: usize) {
        let ((item, head_of_item), rows) = (self.batch.item_and_head(head), &self.batch.segment(head).rows);
        if number < rows.total() {
            let token = rows.token(number);
            prefetch_far(self.inputs.query.head(item, head_of_item).row(token));
            prefetch_far(self.grad_out.head(item, head_of_item).row(token));
        }
    }

    /// Prefetches the sums of the block of keys behind this one, and where its gradients go.
    ///
    /// At 4 blocks per row, what is not the exact blocks waits for memory here and in `row`. No gain (length 4096, 8 heads, Zen 4): to
    /// write each block right after the last row that selected it, while its sums are near; to spread the prefetches over the
    /// products; stores past the caches; to write a whole block in one kernel.
    ///
    /// # Safety
    /// - Nothing else holds the rows of that block in the gradients of keys and values.
    unsafe fn prefetch_keys_after(&self, group: usize, block: usize, sums: &KeySums<'_, E::Compute>) {
        let ((item, kv_head), keys) = (self.batch.item_and_kv_head(group), &self.batch.segment_of_group(group).keys);
        if block + 1 < keys.len() {
            let (numbers, of) = (keys.numbers(block + 1), |channels| self.problem.padded::<E::Compute>(channels));
            let (key_width, value_width) = (of(self.problem.head_dim), of(self.value_dim));
            prefetch_far(&sums.dk[numbers.start * key_width..numbers.end * key_width]);
            prefetch_far(&sums.dv[numbers.start * value_width..numbers.end * value_width]);
            for token in keys.range(block + 1) {
                // SAFETY: the caller's.
                unsafe {
                    prefetch_far(self.gradients.key.row_mut(item, kv_head, token));
                    prefetch_far(self.gradients.value.row_mut(item, kv_head, token));
                }
            }
        }
    }

    /// Calls `step` with the selected keys of a block of queries, as many at a time as a batch holds.
    pub(super) fn for_batches(
        &self,
        head: usize,
        i: usize,
        keys: &mut KeyBatch<E::Compute>,
        source: &KeySource<'_, E>,
        mut step: impl FnMut(&KeyBatch<E::Compute>),
    ) {
        keys.clear();
        for &j in self.plan.row(self.batch, head, i) {
            let numbers = source.numbers(j as usize);
            if !keys.push(source, numbers.clone()) {
                step(keys);
                keys.clear();
                assert!(keys.push(source, numbers), "an empty batch has room for a block");
            }
        }
        if keys.rows() > 0 {
            step(keys);
        }
    }

    /// Writes dk and dv of a block of keys.
    ///
    /// # Safety
    /// - Nothing else holds the rows of this block in the gradients of keys and values.
    unsafe fn finish_keys(&self, group: usize, block: usize, sums: &KeySums<'_, E::Compute>) {
        let pooled =
            self.coarse.as_ref().map(|coarse| (coarse.dk(self.batch, group, block), coarse.dv(self.batch, group, block)));
        // SAFETY: the caller's.
        unsafe { finish_keys(self.problem, self.batch, self.gradients, (group, block), sums, pooled) };
    }
}
