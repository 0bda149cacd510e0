//! What `benchmarks/kernels.rs` and `make bench` time: the kernels of one batch of keys by themselves, and the peak of the CPU.
//!
//! Not part of the interface of the crate.

#![allow(missing_docs, clippy::missing_panics_doc, reason = "for the benchmarks of this repository alone")]

use std::hint::black_box;
use std::time::Instant;

use crate::exec::Buffer;
use crate::kernels::{Gemm, Init, Matrix, MatrixMut, OnlineSoftmax};
use crate::simd::{Kernel, Level, Scalar, Simd};

/// Queries and keys of a step of the exact level, and channels of the usual head.
pub const QUERIES: usize = 32;
pub const KEYS: usize = 128;
pub const CHANNELS: usize = 64;

/// One step of the exact level, the operands where the forward pass has them.
pub struct Step {
    level: Level,
    queries: Buffer<f32>,
    keys: Buffer<f32>,
    values: Buffer<f32>,
    logits: Buffer<f32>,
    out: Buffer<f32>,
    maximum: Buffer<f32>,
    sum: Buffer<f32>,
    rescale: Buffer<f32>,
}

impl Step {
    pub fn new(level: Level) -> Self {
        let numbers = |count: usize| {
            let mut numbers = Buffer::scratch(count);
            for (i, x) in numbers.iter_mut().enumerate() {
                *x = ((i * 7919) % 2003) as f32 / 1001.5 - 1.0;
            }
            numbers
        };
        Self {
            level,
            queries: numbers(CHANNELS * QUERIES),
            keys: numbers(KEYS * CHANNELS),
            values: numbers(KEYS * CHANNELS),
            logits: Buffer::zeros(KEYS * QUERIES),
            out: Buffer::zeros(QUERIES * CHANNELS),
            maximum: Buffer::zeros(QUERIES),
            sum: Buffer::zeros(QUERIES),
            rescale: Buffer::zeros(QUERIES),
        }
    }

    /// Floating point operations of [`Self::logits`], and of [`Self::weighted_values`].
    pub const PRODUCT: u64 = 2 * (QUERIES * KEYS * CHANNELS) as u64;

    pub fn logits(&mut self) {
        f32::run(
            self.level,
            Gemm {
                a: Matrix::new(&self.keys, KEYS, CHANNELS, CHANNELS),
                a_transposed: false,
                b: Matrix::new(&self.queries, CHANNELS, QUERIES, QUERIES),
                b_rows: None,
                c: MatrixMut::new(&mut self.logits, KEYS, QUERIES, QUERIES),
                init: Init::Zero,
                ahead: None,
            },
        );
    }

    pub fn softmax(&mut self) {
        self.maximum.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        f32::run(
            self.level,
            OnlineSoftmax {
                logits: MatrixMut::new(&mut self.logits, KEYS, QUERIES, QUERIES),
                maximum: &mut self.maximum,
                sum: &mut self.sum,
                rescale: &mut self.rescale,
            },
        );
    }

    pub fn weighted_values(&mut self) {
        f32::run(
            self.level,
            Gemm {
                a: Matrix::new(&self.logits, KEYS, QUERIES, QUERIES),
                a_transposed: true,
                b: Matrix::new(&self.values, KEYS, CHANNELS, CHANNELS),
                b_rows: None,
                c: MatrixMut::new(&mut self.out, QUERIES, CHANNELS, CHANNELS),
                init: Init::ScaleRows(&self.rescale),
                ahead: None,
            },
        );
    }

    /// The three of them.
    pub fn all(&mut self) {
        self.logits();
        self.softmax();
        self.weighted_values();
    }
}

/// Fused multiply-adds on registers alone: twelve independent sums, as the products have them.
pub struct Peak(pub usize);

impl Peak {
    /// Floating point operations.
    pub fn operations(&self, level: Level) -> u64 {
        (2 * 12 * self.0 * f32::lanes(level)) as u64
    }

    pub fn measure(&self, level: Level) -> f32 {
        f32::run(level, Self(self.0))
    }
}

impl Kernel<f32> for Peak {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd<f32>>(self, simd: S) -> f32 {
        let (factor, term) = (simd.splat(black_box(0.999)), simd.splat(black_box(0.001)));
        let mut sums = [term; 12];
        for _ in 0..self.0 {
            for sum in &mut sums {
                *sum = simd.mul_add(*sum, factor, term);
            }
        }
        let total = sums.into_iter().fold(term, |a, b| simd.add(a, b));
        let mut lanes = [0.0; 64];
        // SAFETY: no vector has more than 64 lanes.
        unsafe { simd.store(lanes.as_mut_ptr(), total) };
        lanes.iter().sum()
    }
}

/// The best rates of many short runs on one thread, in GFLOP/s: of fused multiply-adds alone, of both products of a step,
/// and of the whole step, whose exponentials are not counted as operations.
pub fn rates(level: Level) -> (f64, f64, f64) {
    let best = |operations: u64, run: &mut dyn FnMut()| {
        let fastest = (0..2000)
            .map(|_| {
                let start = Instant::now();
                run();
                start.elapsed().as_secs_f64()
            })
            .fold(f64::INFINITY, f64::min);
        operations as f64 / fastest / 1e9
    };
    let (mut step, peak) = (Step::new(level), Peak(20_000));
    let alone = best(peak.operations(level), &mut || {
        black_box(peak.measure(level));
    });
    let products = best(2 * Step::PRODUCT, &mut || {
        step.logits();
        step.weighted_values();
    });
    (alone, products, best(2 * Step::PRODUCT, &mut || step.all()))
}
