//! The gradient of an additive bias: the gradient of the logits, summed over all pairs that share a number of the bias.
//!
//! A pass of its own after that of queries, keys and values, so that nobody else pays for it: it computes the weights once more.
//! What it needs beside the gradient itself is a few rows for each thread, in float64, since many numbers may fall to one sum; where all
//! queries share a row, one or a few for each row of the gradient.
//!
//! ```text
//! for each row of the bias, some at a time: for each batch item, for each head that shares it        a task
//!     rows += gradients of exact pairs            mra::block::bias_gradient, mra::token::bias_gradient
//!     rows += shares of coarse blocks
//! ```
//!
//! A task has its own rows, and adds what shares them in one order: the same bits for any number of threads.

use std::ops::Range;

use half::{bf16, f16};

use super::attend::QueryTerms;
use super::block::{BiasBuffers, BiasPass, read_plans};
use super::inputs::{Gradients, Inputs};
use super::problem::{Batch, Blocks, Form, Problem};
use super::pyramid::BlockLevel;
use super::token;
use crate::error::{Error, Result};
use crate::exec::{Chunks, TensorMut, threads};
use crate::simd::Element;
use crate::tensor::Tensor;

/// Where the gradient of an additive bias goes: `(B, H, Lq, Lk)`, with 1 in place of each size along which the bias is repeated and its
/// gradient is to be summed.
#[derive(Debug)]
pub enum BiasGradient<'a> {
    /// In float32.
    F32(TensorMut<'a, f32>),
    /// In float64.
    F64(TensorMut<'a, f64>),
    /// In bfloat16.
    Bf16(TensorMut<'a, bf16>),
    /// In float16.
    F16(TensorMut<'a, f16>),
}

/// Queries of a task: their rows of a bias for some thousand keys fit into a second-level cache.
const QUERIES: usize = 64;

/// Parts in which all queries are summed where they share one row, at least, unless there are fewer pieces of work: a number that does
/// not depend on the threads.
const PARTS: usize = 16;

impl BiasGradient<'_> {
    fn shape(&self) -> [usize; 4] {
        match self {
            Self::F32(tensor) => tensor.shape(),
            Self::F64(tensor) => tensor.shape(),
            Self::Bf16(tensor) => tensor.shape(),
            Self::F16(tensor) => tensor.shape(),
        }
    }

    /// Checks the shape.
    pub(crate) fn validate(&self, problem: &Problem<'_>) -> Result<()> {
        let Some(bias) = problem.additive_bias() else {
            return Err(Error::new("grad_bias: given, expected None where there is no additive bias"));
        };
        let (shape, repeated) = (self.shape(), bias.is_repeated());
        let fits = |dim: usize| shape[dim] == bias.shape[dim] || (shape[dim] == 1 && repeated[dim]);
        if (0..4).all(fits) {
            return Ok(());
        }
        Err(Error::new(format!(
            "grad_bias: shape {shape:?}, expected {:?}, or 1 in place of a size along which the bias is repeated",
            bias.shape
        )))
    }

    /// Writes a row.
    ///
    /// # Safety
    /// - Nothing else holds this row.
    #[allow(clippy::cast_possible_truncation, reason = "rounding is the purpose")]
    unsafe fn write(&self, [item, head, query]: [usize; 3], sums: &[f64]) {
        // SAFETY: the caller's.
        unsafe {
            match self {
                Self::F32(to) => round(sums, to.row_mut(item, head, query), |x| x as f32),
                Self::F64(to) => to.row_mut(item, head, query).copy_from_slice(sums),
                Self::Bf16(to) => round(sums, to.row_mut(item, head, query), bf16::from_f64),
                Self::F16(to) => round(sums, to.row_mut(item, head, query), f16::from_f64),
            }
        }
    }

    /// Computes it for the sequences of both forms. Shapes are those of the problem.
    #[allow(clippy::too_many_arguments, reason = "what backward has")]
    pub(crate) fn compute<E: Element>(
        &self,
        problem: &Problem<'_>,
        [blocks, tokens]: [&Batch<'_>; 2],
        inputs: &Inputs<'_, E>,
        grad_out: &Tensor<'_, E>,
        terms: &[QueryTerms<E::Compute>],
        plan: &[u8],
        gradients: &Gradients<'_, E>,
    ) {
        let any_blocks = !blocks.segments.is_empty();
        let levels = if any_blocks { BlockLevel::all(problem) } else { Vec::new() };
        let plans = if any_blocks { read_plans(&levels, plan) } else { Vec::new() };
        let pass = Pass {
            problem,
            blocks: any_blocks.then(|| BiasPass::new(&levels, &plans, inputs, grad_out, terms, gradients)),
            tokens: (!tokens.segments.is_empty())
                .then(|| token::Pass::new(problem, tokens, inputs, grad_out, terms, plan, gradients)),
            to: self,
            shape: self.shape(),
        };
        if pass.shape[2] == problem.query_len {
            pass.by_queries();
        } else {
            pass.by_parts();
        }
    }
}

fn round<T>(from: &[f64], to: &mut [T], nearest: impl Fn(f64) -> T) {
    to.iter_mut().zip(from).for_each(|(to, &x)| *to = nearest(x));
}

/// Sums of the gradients of some rows of a bias.
pub(crate) struct BiasSums<'a> {
    sums: &'a mut [f64],
    /// The first query.
    first: usize,
    /// The distance from query to query, and from key to key; 0 where they share.
    steps: [usize; 2],
}

impl BiasSums<'_> {
    /// Adds a number for each of the keys with these numbers, to the row of a query.
    pub(crate) fn add(&mut self, query: usize, keys: &Blocks, numbers: Range<usize>, gradients: impl Iterator<Item = f64>) {
        if numbers.is_empty() {
            return;
        }
        let row = &mut self.sums[(query - self.first) * self.steps[0]..];
        if self.steps[1] == 0 {
            row[0] += gradients.take(numbers.len()).sum::<f64>();
        } else if keys.consecutive(numbers.clone()) {
            let row = &mut row[keys.token(numbers.start)..][..numbers.len()];
            row.iter_mut().zip(gradients).for_each(|(sum, gradient)| *sum += gradient);
        } else {
            numbers.zip(gradients).for_each(|(number, gradient)| row[keys.token(number)] += gradient);
        }
    }
}

/// What a thread reuses.
type Scratch<'a, E> = (Option<BiasBuffers<<E as Element>::Compute>>, Option<token::Scratch<'a, <E as Element>::Compute>>);

/// One call.
struct Pass<'a, 'g, E: Element> {
    problem: &'a Problem<'a>,
    blocks: Option<BiasPass<'a, 'g, E>>,
    tokens: Option<token::Pass<'a, 'g, E>>,
    to: &'a BiasGradient<'a>,
    shape: [usize; 4],
}

impl<'a, E: Element> Pass<'a, '_, E> {
    fn scratch(&self) -> Scratch<'a, E> {
        (self.blocks.as_ref().map(BiasPass::buffers), self.tokens.as_ref().map(token::Pass::bias_scratch))
    }

    fn threads(&self) -> usize {
        let Problem { batch, heads, query_len, key_len, .. } = *self.problem;
        self.problem.threads_to_read(batch * heads * query_len * key_len)
    }

    /// One task for a few rows.
    fn by_queries(&self) {
        let [items, heads, length, keys] = self.shape;
        let chunks = length.div_ceil(QUERIES);
        let scratch = || (self.scratch(), vec![0.0; QUERIES * keys]);
        threads::for_each(self.threads(), items * heads * chunks, scratch, |(scratch, sums), task| {
            let (item, head, tokens) = (task / chunks / heads, task / chunks % heads, part(task % chunks, length));
            sums.fill(0.0);
            for (item, head) in self.sharers(item, head) {
                self.add(item, head, tokens.clone(), scratch, &mut self.rows(sums, tokens.start, keys));
            }
            for (query, sums) in tokens.zip(sums.chunks_exact(keys.max(1))) {
                // SAFETY: each task has its own rows.
                unsafe { self.to.write([item, head, query], &sums[..keys]) };
            }
        });
    }

    /// One task for a part of the queries that share a row.
    fn by_parts(&self) {
        let [items, heads, _, keys] = self.shape;
        let length = self.problem.query_len;
        let chunks = length.div_ceil(QUERIES);
        // Rows of their own are tasks enough; only where there are few of them is each summed in parts.
        let parts = PARTS.div_ceil((items * heads).max(1));
        let mut partial = vec![0.0; items * heads * parts * keys];
        {
            let partial = Chunks::new(&mut partial, keys);
            threads::for_each(
                self.threads(),
                items * heads * parts,
                || self.scratch(),
                |scratch, task| {
                    let (item, head) = (task / parts / heads, task / parts % heads);
                    let sharers = self.sharers(item, head).flat_map(|place| (0..chunks).map(move |chunk| (place, chunk)));
                    let count = sharers.clone().count();
                    let ends = [task % parts, task % parts + 1].map(|part| count * part / parts);
                    // SAFETY: each task has its own sums.
                    let sums = unsafe { partial.get_mut(task) };
                    for ((item, head), chunk) in sharers.skip(ends[0]).take(ends[1] - ends[0]) {
                        let tokens = part(chunk, length);
                        self.add(item, head, tokens.clone(), scratch, &mut self.rows(sums, tokens.start, 0));
                    }
                },
            );
        }
        let mut sums = vec![0.0; keys];
        for row in 0..items * heads {
            sums.fill(0.0);
            for part in row * parts..(row + 1) * parts {
                sums.iter_mut().zip(&partial[part * keys..]).for_each(|(sum, x)| *sum += x);
            }
            // SAFETY: the tasks are done.
            unsafe { self.to.write([row / heads, row % heads, 0], &sums) };
        }
    }

    /// The batch items and heads that share the row of an item and a head of the gradient.
    fn sharers(&self, item: usize, head: usize) -> impl Iterator<Item = (usize, usize)> + Clone + use<E> {
        let all = |of_gradient: usize, all: usize, own: usize| if of_gradient == all { own..own + 1 } else { 0..all };
        let heads = all(self.shape[1], self.problem.heads, head);
        let items = all(self.shape[0], self.problem.batch, item);
        items.flat_map(move |item| heads.clone().map(move |head| (item, head)))
    }

    fn rows<'s>(&self, sums: &'s mut [f64], first: usize, step: usize) -> BiasSums<'s> {
        BiasSums { sums, first, steps: [step, usize::from(self.shape[3] == self.problem.key_len)] }
    }

    /// Adds the gradients of some queries of a head of a batch item.
    fn add(
        &self,
        item: usize,
        head: usize,
        tokens: Range<usize>,
        (of_blocks, of_tokens): &mut Scratch<'a, E>,
        sums: &mut BiasSums<'_>,
    ) {
        let form = self.problem.segments[item].form;
        let before = self.problem.segments[..item].iter().filter(|segment| segment.form == form).count();
        let flat_head = before * self.problem.heads + head;
        match (form, &self.blocks, of_blocks, &self.tokens, of_tokens) {
            (Form::Block, Some(pass), Some(buffers), ..) => pass.add(flat_head, tokens, buffers, sums),
            (Form::Token, _, _, Some(pass), Some(scratch)) => pass.add_to_bias(flat_head, tokens, scratch, sums),
            _ => unreachable!("a pass for each form that there is"),
        }
    }
}

/// Some of the queries.
fn part(index: usize, length: usize) -> Range<usize> {
    index * QUERIES..((index + 1) * QUERIES).min(length)
}
