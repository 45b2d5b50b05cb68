//! Getting a virtual processor's thread out of guest mode.
//!
//! A signal alone could come just before the thread enters the kernel and be lost; so the run page's `immediate_exit`
//! is set first, which makes the next entry return at once.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::{KvmError, Processor};

const PAGE: usize = 4096;

/// Offset of `immediate_exit` in the run page.
const IMMEDIATE_EXIT: usize = std::mem::offset_of!(kvm_run, immediate_exit);
const _: () = assert!(IMMEDIATE_EXIT == 1);

/// Interrupts one virtual processor; from any thread.
#[derive(Debug)]
pub struct Kick {
    page: NonNull<u8>,
}

// SAFETY: the mapping is shared and owned by this value; only one byte of it is touched, atomically.
unsafe impl Send for Kick {}
// SAFETY: as above.
unsafe impl Sync for Kick {}

impl Kick {
    /// A second mapping of the processor's run page.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn new(vcpu: &Processor) -> Result<Self, KvmError> {
        let failed = |error: rustix::io::Errno| KvmError::Ioctl {
            what: "map the run page of a virtual processor",
            source: error.into(),
        };
        // SAFETY: the descriptor is open for as long as `vcpu` is borrowed.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(super::raw(&vcpu.fd)) };
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh address range chosen by the kernel.
        let page =
            unsafe { mmap(std::ptr::null_mut(), PAGE, prot, MapFlags::SHARED, fd, 0) }.map_err(failed)?;
        let page = NonNull::new(page.cast::<u8>()).ok_or(failed(rustix::io::Errno::NOMEM))?;
        Ok(Self { page })
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte lies inside the page, which stays mapped while `self` lives; the kernel only reads it, and
        // everyone here goes through this atomic.
        unsafe { AtomicU8::from_ptr(self.page.as_ptr().add(IMMEDIATE_EXIT)) }
    }

    /// Makes the processor whose thread is `thread` leave guest mode, or not enter it, until [`Kick::clear`].
    pub fn kick(&self, thread: i32) {
        self.immediate_exit().store(1, Ordering::SeqCst);
        // SAFETY: no memory is involved; a thread that ended meanwhile is reported and ignored.
        unsafe {
            libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal());
        }
    }

    /// Called by the processor's own thread before it looks at what was asked of it.
    pub fn clear(&self) {
        self.immediate_exit().store(0, Ordering::SeqCst);
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping.
        let _ = unsafe { munmap(self.page.as_ptr().cast(), PAGE) };
    }
}

fn signal() -> i32 {
    libc::SIGRTMIN()
}

extern "C" fn ignore(_: libc::c_int) {}

/// Installs the handler that makes the signal interrupt an ioctl rather than end the process. Once is enough.
pub fn install_signal() {
    // SAFETY: a zeroed `sigaction` is a valid value; the handler does nothing.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = ignore as *const () as usize;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(signal(), &raw const action, std::ptr::null_mut());
    }
}
